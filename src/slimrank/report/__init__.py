"""The report of a run: one record, rendered as JSON, Markdown or a table in the terminal."""
