"""One file per question about speed; `common` holds what they share."""
