"""What every benchmark needs: timing, the machine's description, the command line."""
