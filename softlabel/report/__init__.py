"""Numbers to what a person looks at."""
