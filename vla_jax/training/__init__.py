"""Training: the parameter table, the optimiser, the step, the mesh, the checkpoints and the loop."""
