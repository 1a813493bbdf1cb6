"""One verb a file; each composes the rooms and says what happened."""
