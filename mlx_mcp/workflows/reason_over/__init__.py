"""One question over input that no prompt can hold, worked through in a sandbox by a model or by a program of ours."""
