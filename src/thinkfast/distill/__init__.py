"""Layer-wise alignment and distillation with exact resume."""
