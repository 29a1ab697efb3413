"""The faces: one folder for each protocol, which never import each other."""
