"""Text: sources, tokens, and windows of tokens by request."""
