"""What changes training from outside the model: sparsity schedule, clamping, clipping."""
