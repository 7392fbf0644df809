"""One file per training method; private files hold what methods of one family share."""
