"""Search for the best schedule config of each kernel, measured on the board."""
