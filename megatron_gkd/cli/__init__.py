"""One main per command; launch/, tools/ and the console commands point here."""
