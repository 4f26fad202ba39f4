"""`actcache inspect`: a cache's facts as text, JSON or an HTML page."""
