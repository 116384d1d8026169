"""What a model computes, read from its own graph: steps over rows, their reference, and what reads them."""
