"""Who owns which block (`blocks`), and the tensors behind (`pages`)."""
