"""debug=true: the model as a table, one batch overfitted, checks on."""
