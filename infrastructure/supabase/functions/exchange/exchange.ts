// The token exchange: an API token in, a JWT of at most 15 minutes out. `ledger/issuer.py` answers the same requests
// in the same way for installations without Supabase; a change of one is a change of the other.

export interface ExchangeSettings {
  supabaseUrl: string;
  secretKey: string; // of the role `service_role`
  signingKey: JsonWebKey & { kid?: string }; // private, P-256
  issuer: string;
}

type Answer = { outcome: string; [member: string]: unknown };
type Body = { token: string } | { bootstrap: string; session_hash: string };
type Publisher = { keys: Record<string, unknown>[] };

const LONGEST_LIFETIME_SECONDS = 900;
const LONGEST_BODY = 1024;
const LEDGER_MILLISECONDS = 5_000;
const SIGNATURE = { name: "ECDSA", hash: "SHA-256" };
const TOKEN = /^(?:ow|owp)_[A-Za-z0-9_-]{43}$/;
const BOOTSTRAP = /^owb_[A-Za-z0-9_-]{43}$/;
const HASH = /^[0-9a-f]{64}$/;

/** Answers `POST .../exchange` and `GET .../.well-known/jwks.json`. No token reaches a log. */
export class Exchange {
  private constructor(
    private readonly settings: ExchangeSettings,
    private readonly key: CryptoKey,
    private readonly kid: string,
    private readonly jwks: Publisher,
  ) {}

  static async open(settings: ExchangeSettings): Promise<Exchange> {
    const { kty, crv, x, y, d, kid: named } = settings.signingKey;
    const curve = { name: "ECDSA", namedCurve: "P-256" };
    // Only these members: `key_ops` of a key made elsewhere may forbid what we do with it.
    const key = await crypto.subtle.importKey("jwk", { kty, crv, x, y, d }, curve, false, ["sign"]);
    const published = await crypto.subtle.importKey("jwk", { kty, crv, x, y }, curve, false, ["verify"]);
    const proof = await crypto.subtle.sign(SIGNATURE, key, utf8(""));
    if (!await crypto.subtle.verify(SIGNATURE, published, proof, utf8(""))) throw new Error("two halves of two keys");
    const kid = named ?? base64url(await sha256(JSON.stringify({ crv, kty, x, y }))); // RFC 7638
    const jwks = { keys: [{ kty, crv, x, y, kid, alg: "ES256", use: "sig" }] };
    return new Exchange(settings, key, kid, jwks);
  }

  /** The handler for `Deno.serve`. */
  readonly handle = async (request: Request): Promise<Response> => {
    const path = new URL(request.url).pathname;
    if (path.endsWith("/.well-known/jwks.json")) {
      if (request.method !== "GET") return error(405, "method_not_allowed");
      return json(200, this.jwks, { "Cache-Control": "public, max-age=300" });
    }
    if (!path.endsWith("/exchange")) return error(404, "not_found");
    if (request.method !== "POST") return error(405, "method_not_allowed");
    const raw = await readBody(request);
    if (raw === null) return error(413, "too_large");
    const body = parse(raw);
    if (body === null) return error(400, "invalid_request");
    try {
      const source = await sourceOf(request);
      return "token" in body ? await this.grant(body.token, source) : await this.redeem(body, source);
    } catch (failure) {
      console.error("A token could not be looked up:", failure instanceof Error ? failure.message : "unknown");
      if (failure instanceof Unavailable) return error(503, "unavailable", 1);
      return error(500, "internal");
    }
  };

  private async grant(secret: string, source: string): Promise<Response> {
    if (!TOKEN.test(secret)) return refused();
    const answer = await this.call("exchange_token", { hash: hex(await sha256(secret)), source });
    if (answer.outcome !== "granted") return notGranted(answer);
    const claims = answer.claims as Record<string, unknown>;
    const now = Math.floor(Date.now() / 1000); // Rounded down: a time in the future would not be valid yet.
    const exp = Math.min(Math.trunc(Number(claims.exp)), now + LONGEST_LIFETIME_SECONDS);
    if (!Number.isSafeInteger(exp)) throw new Error("the ledger granted no time");
    const token = await this.sign({ ...claims, iss: this.settings.issuer, iat: now, exp });
    return json(200, { access_token: token, token_type: "bearer", expires_in: exp - now });
  }

  private async redeem(body: { bootstrap: string; session_hash: string }, source: string): Promise<Response> {
    if (!BOOTSTRAP.test(body.bootstrap) || !HASH.test(body.session_hash)) return refused();
    const hash = hex(await sha256(body.bootstrap));
    const answer = await this.call("redeem_bootstrap", { hash, session_hash: body.session_hash, source });
    if (answer.outcome !== "redeemed") return notGranted(answer);
    // No JWT: who knows only the hash of the session must not get one.
    return json(200, { worker_id: answer.worker_id, organization_id: answer.organization_id });
  }

  private async call(name: string, values: Record<string, string>): Promise<Answer> {
    const { supabaseUrl, secretKey } = this.settings;
    let response: Response;
    try {
      response = await fetch(`${supabaseUrl}/rest/v1/rpc/${name}`, {
        method: "POST",
        headers: { "Content-Type": "application/json", apikey: secretKey, Authorization: `Bearer ${secretKey}` },
        body: JSON.stringify(values),
        signal: AbortSignal.timeout(LEDGER_MILLISECONDS),
      });
      if (response.status < 500) {
        if (!response.ok) throw new Error(`the ledger refused \`${name}\` with status ${response.status}`);
        const rows = await response.json();
        return rows.length > 0 ? rows[0] : { outcome: "refused" };
      }
    } catch (failure) {
      if (failure instanceof TypeError || failure instanceof DOMException) throw new Unavailable(name);
      throw failure;
    }
    await response.body?.cancel();
    throw new Unavailable(name);
  }

  private async sign(claims: Record<string, unknown>): Promise<string> {
    const header = { alg: "ES256", kid: this.kid, typ: "JWT" };
    const text = [header, claims].map((part) => base64url(utf8(JSON.stringify(part)))).join(".");
    const signature = await crypto.subtle.sign(SIGNATURE, this.key, utf8(text));
    return `${text}.${base64url(new Uint8Array(signature))}`;
  }
}

class Unavailable extends Error {
  constructor(name: string) {
    super(`the ledger did not answer \`${name}\``);
  }
}

/** The body, or null when it is longer than any honest one. */
async function readBody(request: Request): Promise<Uint8Array | null> {
  const body = new Uint8Array(LONGEST_BODY);
  let length = 0;
  for await (const part of request.body ?? []) {
    if (length + part.length > LONGEST_BODY) return null;
    body.set(part, length);
    length += part.length;
  }
  return body.subarray(0, length);
}

function parse(raw: Uint8Array): Body | null {
  let body: unknown;
  try {
    body = JSON.parse(new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(raw));
  } catch {
    return null;
  }
  if (typeof body !== "object" || body === null || Array.isArray(body)) return null;
  const names = Object.keys(body).sort().join();
  if (names !== "token" && names !== "bootstrap,session_hash") return null;
  return Object.values(body).every((value) => typeof value === "string") ? body as Body : null;
}

/** Tells callers apart for the limit of failed attempts, without keeping their addresses. */
async function sourceOf(request: Request): Promise<string> {
  // Of X-Forwarded-For only the last address is a proxy's word; the others are whatever the caller wrote.
  const forwarded = request.headers.get("x-forwarded-for")?.split(",").at(-1)?.trim();
  const address = request.headers.get("cf-connecting-ip") ?? forwarded;
  return address ? hex(await sha256(address)) : "";
}

function notGranted(answer: Answer): Response {
  if (answer.outcome !== "limited") return refused();
  return error(429, "too_many_attempts", Math.ceil(Number(answer.retry_after)));
}

function refused(): Response {
  return error(401, "invalid_token");
}

function error(status: number, name: string, retryAfter?: number): Response {
  return json(status, { error: name }, retryAfter === undefined ? {} : { "Retry-After": `${Math.max(retryAfter, 1)}` });
}

function json(status: number, content: unknown, headers: Record<string, string> = {}): Response {
  return Response.json(content, { status, headers: { "Cache-Control": "no-store", ...headers } });
}

function utf8(text: string): Uint8Array<ArrayBuffer> {
  return new TextEncoder().encode(text);
}

async function sha256(text: string): Promise<Uint8Array> {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", utf8(text)));
}

function hex(bytes: Uint8Array): string {
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function base64url(bytes: Uint8Array): string {
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}
