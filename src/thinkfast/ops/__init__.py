"""State-space and convolution operators: a naive oracle, a fast path, and a single decode step of each."""
