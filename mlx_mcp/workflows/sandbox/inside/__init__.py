"""What programs find in a sandbox, beside what the interpreter has. These files run there, and are not imported here.

`prelude.py` puts a definition into a sandbox when a program first uses its name: `_heapq_nlargest` is what
`heapq.nlargest` stands for in a program. The interpreter knows no inheritance and no method decorators, and within its
own `sorted`, `map` or `max` no host function can be called.
"""
