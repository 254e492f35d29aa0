"""nnsight, here and on a server."""
