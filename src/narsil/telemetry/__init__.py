"""What is seen while Narsil runs: the observer that engine and transports tell, and what stands behind it."""
