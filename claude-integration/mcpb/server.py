"""What Claude Desktop starts of the bundle: the server over stdio."""

import sys

from mlx_mcp.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["serve"]
    main()
