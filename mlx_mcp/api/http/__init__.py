"""HTTP: who gets in, and the app that all of it makes."""
