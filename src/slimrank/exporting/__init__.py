"""Write models in the form of another engine, and run them there."""
