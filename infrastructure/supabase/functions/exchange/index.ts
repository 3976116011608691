// Supabase's edge function `exchange`: the settings of `exchange.ts` come from the function's secrets.
// It is deployed without `verify_jwt`, because whoever calls it has no JWT yet.

import { Exchange } from "./exchange.ts";

function secret(name: string): string {
  const value = Deno.env.get(name);
  if (!value) throw new Error(`The secret \`${name}\` of the function is missing. See docs/supabase.md.`);
  return value;
}

function parsed(name: string) {
  try {
    return JSON.parse(secret(name));
  } catch {
    throw new Error(`The secret \`${name}\` of the function is not JSON.`); // Without the text, which is a secret.
  }
}

function secretKey(): string {
  // Projects made before 2026 may have only the older kind of key.
  if (!Deno.env.has("SUPABASE_SECRET_KEYS")) return secret("SUPABASE_SERVICE_ROLE_KEY");
  const key = parsed("SUPABASE_SECRET_KEYS")?.default;
  if (typeof key !== "string") throw new Error("`SUPABASE_SECRET_KEYS` has no key named `default`.");
  return key;
}

async function open(): Promise<Exchange> {
  const supabaseUrl = secret("SUPABASE_URL");
  const issuer = Deno.env.get("OW_TOKEN_ISSUER") ?? `${supabaseUrl}/functions/v1/exchange`;
  const settings = { supabaseUrl, secretKey: secretKey(), signingKey: parsed("OW_SIGNING_KEY"), issuer };
  try {
    return await Exchange.open(settings);
  } catch {
    throw new Error("The secret `OW_SIGNING_KEY` of the function is not a private ES256 key in JWK form.");
  }
}

const exchange = await open();
Deno.serve(exchange.handle);
