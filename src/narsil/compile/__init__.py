"""What `narsil compile` does: take a model apart, plan, pack, build, and hold the result against the artifact."""
