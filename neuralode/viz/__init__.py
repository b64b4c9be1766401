"""Arrays in, matplotlib figures out; the only room that imports matplotlib."""
