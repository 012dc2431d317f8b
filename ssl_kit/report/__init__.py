"""What people look at: one self-contained HTML page per run, and the pictures it shows. Reads files only."""
