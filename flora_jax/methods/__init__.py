"""Methods, a linear script each: flora, slim, closed_form, transfer."""
