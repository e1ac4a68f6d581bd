"""Generation and editing with a loaded model, and the frozen encoders of training."""
