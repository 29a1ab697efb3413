"""What runs in a CPython child of a sandbox: it reads requests, runs programs, and keeps their variables.

The child imports these files and the few that they need; this process imports none of them.
"""
