"""Parts of the web page."""
