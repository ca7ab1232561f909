"""Question answering corpora: their formats, read row by row into one form, and the store that workers share."""
