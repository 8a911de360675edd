"""Truth or soft labels to a student, on Ray Train."""
