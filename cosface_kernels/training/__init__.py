"""From a folder of faces to a trained backbone and verified numbers. Needs the extras [train]; nothing else imports it."""
