"""Fine-tuning: the recipe, the trainer, checkpoints, progress and plots."""
