"""Folders that slimrank wrote, on the Hugging Face hub."""
