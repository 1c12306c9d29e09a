"""What an earlier version made, and must still load, draw, resume and run the same; `made/` holds it."""
