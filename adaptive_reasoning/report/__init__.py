"""What a run leaves for a person: metric glossary, alarms, console lines, curves, one self-contained HTML page."""
