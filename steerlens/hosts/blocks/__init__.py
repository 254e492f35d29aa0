"""A Hugging Face block run by itself: nominal paths, frozen contexts, second passes, gradients."""
