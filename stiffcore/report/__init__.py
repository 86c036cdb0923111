"""What goes out: tables, statistics, figures and the page."""
