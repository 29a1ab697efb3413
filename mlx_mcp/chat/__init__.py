"""What is said to a model and by it: messages, prompts, pieces of an answer. Knows no model and no protocol."""
