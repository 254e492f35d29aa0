"""What fitting shares: contrast texts, how they are read, losses, the declaration of a method."""
