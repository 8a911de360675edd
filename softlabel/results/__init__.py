"""From soft labels to what others use: scenes with every object once, data sets, several teachers in one store."""
