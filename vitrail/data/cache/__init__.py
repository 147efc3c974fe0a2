"""What is found out about images, or decoded of them, kept on disk for the next command."""
