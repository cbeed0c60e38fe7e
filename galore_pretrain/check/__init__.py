"""`galore-pretrain check`: what this package does on the machine at hand, by value, in parts."""
