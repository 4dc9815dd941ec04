"""What an adapter gives away of rows, measured by attacks on it: losses, membership, extraction, planted canaries."""
