"""What is minimised: one method of training a file."""
