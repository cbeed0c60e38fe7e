"""Many runs, and what is said of them."""
