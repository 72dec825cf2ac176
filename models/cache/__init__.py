"""What generation keeps of the tokens before."""
