"""The control laws that several methods share, their setpoints, and the conditions of gates."""
