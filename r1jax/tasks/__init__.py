"""What the model is for: each task says what a case is and how outputs become loss, metrics and reports."""
