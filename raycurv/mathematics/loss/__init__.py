"""What is differentiated: objectives, labels drawn from the model, gradients that go back."""
