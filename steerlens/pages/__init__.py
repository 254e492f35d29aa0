"""What notebooks and saved pages show: HTML that needs nothing from outside, in the reader's own colours."""
